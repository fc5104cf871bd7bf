"""The console: a page to try the server with, and what it shows of the fleet."""
