// Package ssh is a transport over SSH.
package ssh
