"""What happens while a model trains: the objective, the ceilings, the arms and the trainers."""
