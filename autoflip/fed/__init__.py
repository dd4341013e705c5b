"""One machine, many clients: the federated round, from the configuration to the ledger."""
