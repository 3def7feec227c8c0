"""What must hold of the callbacks whatever the code looks like."""
