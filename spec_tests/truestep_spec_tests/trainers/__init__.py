"""In the trainers of other libraries, in the place of their own callback."""
