"""What leaves the building: cards and, later, records and pushes."""
