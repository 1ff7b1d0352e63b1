"""What is measured about a checkpoint, independently of how it was trained."""
