"""From a trained student to a verified bundle. Imports only `profiles`."""
