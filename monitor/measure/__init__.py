"""What a monitor is worth: figures over labelled streams."""
