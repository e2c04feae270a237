"""What a run does: init.py starts it, step.py takes a step, checkpoint.py keeps it; train.py has the loop."""
