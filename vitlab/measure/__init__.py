"""What a model is measured by: what is inside it, its quality, its speed."""
