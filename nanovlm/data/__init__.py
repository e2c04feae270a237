"""Sample -> Document -> Row -> Batch; types.py has the diagram."""
