"""What a run leaves in its folder, and how a sweep resumes."""
