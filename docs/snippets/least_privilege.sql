GRANT SELECT, INSERT ON audit_events TO gateway_app;
GRANT SELECT, INSERT, UPDATE ON api_keys, approval_requests, approval_votes, notification_deliveries TO gateway_app;
GRANT SELECT ON agent_gateway_store_version, database_identity TO gateway_app;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO gateway_app;
