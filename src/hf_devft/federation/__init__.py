"""One round: clients, local training, aggregation, the ledger. Knows neither the stages nor the trainer."""
