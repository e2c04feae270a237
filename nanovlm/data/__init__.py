"""Sample -> Document -> Row -> Batch; types.py has the drawing."""
