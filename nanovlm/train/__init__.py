"""What a run does: init.py starts it, step.py takes a step, checkpoint.py saves it; train.py has the loop."""
