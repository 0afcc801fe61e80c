"""What is asked: questions, pictures, orders of the choices, published sets."""
