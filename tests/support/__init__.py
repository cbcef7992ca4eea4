"""What tests share: agents, models, encoders, records, samplers, runs, services, faults and kills."""
