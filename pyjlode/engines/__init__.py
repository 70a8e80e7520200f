"""What engines share, and which of them solves a problem."""
