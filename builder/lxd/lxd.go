// Package lxd makes build hosts of LXD instances.
package lxd
