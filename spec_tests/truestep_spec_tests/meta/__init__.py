"""The suite itself, tested."""
