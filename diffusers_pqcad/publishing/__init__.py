"""The whole job from a pipeline to its compressed one, and tables, model cards, pictures, the way to the Hub."""
