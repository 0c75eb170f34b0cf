"""What a backbone computes from pictures: embeddings, patch tokens, attention."""
