"""Task-oriented transfer: adapt the teacher, transfer on unlabelled images, fine-tune; retrieval of transfer sets."""
