"""What makes a network smaller or leave early: cuts of channels, and exits by confidence."""
