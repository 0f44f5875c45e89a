"""What is known of each format: names, grids, args and configs."""
