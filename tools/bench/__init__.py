"""What measures the parts of colm-edge, one script each."""
