"""Tests of bench/: that each benchmark runs and says what it measured, and that the sink answers like storage."""
