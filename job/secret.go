package job

import (
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"strings"
)

// RSASecrets returns a function for Runner.Secret that decrypts secrets as Cyclid encrypts them: with RSA and PKCS #1 v1.5, in base64. key is the
// organization's private key.
func RSASecrets(key *rsa.PrivateKey) func(name, value string) (string, error) {
	return func(_, value string) (string, error) {
		sealed, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(value), ""))
		if err != nil {
			return "", errors.New("it is not base64")
		}
		//lint:ignore SA1019 Cyclid's files are encrypted so; nobody learns from here whether the padding was right.
		plain, err := rsa.DecryptPKCS1v15(nil, key, sealed)
		if err != nil {
			return "", errors.New("it cannot be decrypted with this key")
		}
		return string(plain), nil
	}
}
