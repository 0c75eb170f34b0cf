"""What a backbone gives for pictures: embeddings, patch tokens, attention."""
