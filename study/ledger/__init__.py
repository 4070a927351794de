"""What is asked, running and done: the one source of truth of a study."""
