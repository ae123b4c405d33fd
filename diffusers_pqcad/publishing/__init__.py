"""Tables, model cards, pictures, and the way to the Hub."""
