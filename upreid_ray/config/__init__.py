"""Settings of all jobs, and the errors that users see."""
