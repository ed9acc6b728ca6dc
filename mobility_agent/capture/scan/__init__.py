"""Scan capture: whatever can be read, read again and again; nothing here belongs to one platform."""
