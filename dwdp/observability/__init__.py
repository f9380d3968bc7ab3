"""What a run did, in forms that other programs read."""
