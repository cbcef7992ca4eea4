"""Reading and writing files, and progress bars."""
