"""Colab, Kaggle, Jupyter; and the check-up before a stage."""
