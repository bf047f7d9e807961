"""What is trained inside the blocks; knows no network."""
