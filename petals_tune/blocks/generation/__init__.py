"""Generation: sessions, what they keep, and their steps through the blocks."""
