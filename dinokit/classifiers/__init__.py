"""Labels from embeddings: k-NN, linear classifiers, labelled sets, evaluation."""
