"""Fine-tuning: what each task learns, from which labels, by which loss."""
