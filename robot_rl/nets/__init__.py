"""Networks: backbones that generative heads share, embeddings, encoders."""
