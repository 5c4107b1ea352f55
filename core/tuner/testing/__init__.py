"""What plugin authors test with: the contract kit, a toy model family, rendered clips, and fake distributions."""
