"""What leaves the machine: a stage's folder, its card. Knows neither the stages' maths nor the trainer."""
