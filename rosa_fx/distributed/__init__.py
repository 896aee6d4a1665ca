"""Training in several processes: who takes part, masks from all their gradients, and what is averaged or sharded."""
