"""What the tests share: real parts started for them, and the tools of the system, found or named as missing."""
