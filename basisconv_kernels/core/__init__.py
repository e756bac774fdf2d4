"""The ground floor: errors, environment, checks, problem descriptions, backend choice. Knows no op."""
