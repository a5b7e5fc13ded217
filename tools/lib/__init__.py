"""What the tools share with each other and with the tests."""
