"""What results come to: overfitting, laws, predictions."""
