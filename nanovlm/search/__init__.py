"""Pictures and documents in a folder -> an index of vectors and words -> what is most like a text or a picture."""
