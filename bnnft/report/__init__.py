"""Results of runs and sweeps: what they leave in their folders, and the tables, figures and pages made of it."""
