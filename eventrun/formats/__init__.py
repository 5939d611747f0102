"""Import and export, one module per format. Functions take an open client and wait for what they ask."""
