using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>
/// Programs that people use, through the proxy and without it: the results must be the same.
/// </summary>
[Collection("heavy")]
public sealed class RealProgramsTests : EndToEndTest
{
    [Fact(Timeout = Slow)]
    public async Task Curl_loads_the_same_files_from_nginx_over_https()
    {
        string curl = Tool.Need("curl", "curl");
        string nginx = Tool.Need("nginx", "nginx");
        string openssl = Tool.Need("openssl", "openssl");
        string web = Directory.CreateDirectory(Given.Path("web")).FullName;
        int[] sizes = [0, 1, 1_460, 65_537, 1_000_000, 100_000_000];
        foreach (int size in sizes)
        {
            WriteRandom(Path.Combine(web, $"{size}"), size);
        }

        (await Tool.Run(
            openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost", "-keyout", Given.Path("key.pem"),
            "-out", Given.Path("cert.pem"))).Good();
        int port = Given.FreePorts(1);
        string user = Tool.IsRoot ? "user root;" : string.Empty;
        string configuration = Given.Write(
            "nginx.conf",
            $$"""
            daemon off; pid {{Given.Path("nginx.pid")}}; error_log stderr; {{user}}
            events { worker_connections 512; }
            http {
              access_log off;
              client_body_temp_path {{Given.Path("body")}};
              proxy_temp_path {{Given.Path("proxy")}};
              fastcgi_temp_path {{Given.Path("fcgi")}}; uwsgi_temp_path {{Given.Path("uwsgi")}};
              scgi_temp_path {{Given.Path("scgi")}};
              server {
                listen 127.0.0.1:{{port}} ssl http2; root {{web}};
                ssl_certificate {{Given.Path("cert.pem")}}; ssl_certificate_key {{Given.Path("key.pem")}};
              }
            }
            """);
        Tool.Background(Given, nginx, "-p", Given.Folder, "-c", configuration);
        await WaitForPort(port);

        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", $"127.0.0.1:{port}");
        foreach (string protocol in new[] { "--http1.1", "--http2" })
        {
            List<string> words =
            [
                "--silent", "--show-error", "--fail", protocol, "--parallel",
                "--cacert", Given.Path("cert.pem"),
                "--connect-to", $"localhost:{port}:127.0.0.1:{proxy.Port}",
            ];
            foreach (int size in sizes)
            {
                words.AddRange([$"https://localhost:{port}/{size}", "--output", Given.Path($"got{size}")]);
            }

            (await Tool.Run(curl, [.. words], 120)).Good();
            foreach (int size in sizes)
            {
                Assert.Equal(Hash(Path.Combine(web, $"{size}")), Hash(Given.Path($"got{size}")));
            }
        }
    }

    [Fact(Timeout = Slow)]
    public async Task Redis_answers_pipelined_requests_as_without_the_proxy()
    {
        string server = Tool.Need("redis-server", "redis-server");
        string benchmark = Tool.Need("redis-benchmark", "redis-tools");
        string cli = Tool.Need("redis-cli", "redis-tools");
        int port = Given.FreePorts(1);
        Tool.Background(
            Given, server, "--port", Text(port), "--bind", "127.0.0.1", "--save", "", "--dir", Given.Folder);
        await WaitForPort(port);
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", $"127.0.0.1:{port}");
        string[] through = ["-h", "127.0.0.1", "-p", Text(proxy.Port)];
        string[] direct = ["-h", "127.0.0.1", "-p", Text(port)];

        string report = (await Tool.Run(
            benchmark,
            [
                .. through, "-n", "200000", "-c", "50", "-P", "32", "-d", "1000", "-r", "10000",
                "-t", "set,get", "--csv",
            ],
            120)).Good();
        Assert.Contains("\"SET\"", report, StringComparison.Ordinal);
        Assert.Contains("\"GET\"", report, StringComparison.Ordinal);
        Assert.DoesNotContain("rror", report, StringComparison.Ordinal);

        string big = string.Concat(Enumerable.Range(0, 500_000).Select(i => (char)('a' + (i % 26))));
        (await Tool.Run(cli, [.. through, "-x", "set", "big"], 30, input: big)).Good();
        Assert.Equal(big, (await Tool.Run(cli, [.. direct, "get", "big"])).Good().TrimEnd('\n'));
        Assert.Equal(big, (await Tool.Run(cli, [.. through, "get", "big"])).Good().TrimEnd('\n'));
        string many = string.Concat(Enumerable.Range(0, 50_000).Select(i => $"SET pipe{i} value{i}\r\n"));
        string piped = (await Tool.Run(cli, [.. through, "--pipe"], 60, input: many)).Good();
        Assert.Contains("errors: 0, replies: 50000", piped, StringComparison.Ordinal);
        Assert.Equal("value49999\n", (await Tool.Run(cli, [.. direct, "get", "pipe49999"])).Good());
        Assert.Equal(
            (await Tool.Run(cli, [.. direct, "dbsize"])).Good(),
            (await Tool.Run(cli, [.. through, "dbsize"])).Good());
    }

    [Fact(Timeout = Slow)]
    public async Task Psql_copies_a_large_table_both_ways()
    {
        const int Rows = 400_000;
        string psql = Tool.Need("psql", "postgresql-client");
        string[] homes = Directory.Exists("/usr/lib/postgresql")
            ? [.. Directory.GetDirectories("/usr/lib/postgresql").Select(d => Path.Combine(d, "bin"))]
            : [];
        string? initdb = Tool.Find("initdb", homes);
        string? postgres = Tool.Find("postgres", homes);
        Assert.SkipWhen(initdb is null || postgres is null, "initdb not found: apt-get install postgresql");
        string data = Directory.CreateDirectory(Given.Path("data")).FullName;
        string[] prefix = [];
        if (Tool.IsRoot)
        {
            // the server refuses to run as root
            string runuser = Tool.Need("runuser", "util-linux");
            Outcome user = await Tool.Run("id", "postgres");
            Assert.SkipWhen(user.Status != 0, "no user postgres: apt-get install postgresql");
            (await Tool.Run("chmod", "755", Given.Folder)).Good();
            (await Tool.Run("chown", "postgres", data)).Good();
            prefix = [runuser, "-u", "postgres", "--"];
        }

        string[] make =
            [.. prefix, initdb, "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"];
        (await Tool.Run(make[0], make[1..], 60, data)).Good();
        int port = Given.FreePorts(1);
        string[] serve =
        [
            .. prefix, postgres, "-D", data, "-p", Text(port), "-c", "listen_addresses=127.0.0.1",
            "-c", "unix_socket_directories=", "-c", "fsync=off",
        ];
        Tool.Background(Given, serve[0], serve[1..]);
        string direct = $"host=127.0.0.1 port={port} user=tester dbname=postgres";
        await WaitForPort(port);
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", $"127.0.0.1:{port}");
        string through = $"host=127.0.0.1 port={proxy.Port} user=tester dbname=postgres";
        for (int tries = 0; (await Tool.Run(psql, direct, "-c", "select 1")).Status != 0; tries++)
        {
            Assert.True(tries < 100, "postgres does not become ready");
            await Wait.Pause(100);
        }

        string source = Given.Path("source.csv");
        using (StreamWriter writer = new(source))
        {
            Random random = new(5);
            for (int i = 0; i < Rows; i++)
            {
                writer.Write(
                    $"{i},{random.NextInt64()},{new string((char)('a' + (i % 26)), random.Next(150))}\n");
            }
        }

        await Psql(through, "create table t (id int primary key, n bigint, s text)");
        await Psql(through, $"\\copy t from '{source}' csv");
        await Psql(through, $"\\copy (select * from t order by id) to '{Given.Path("through.csv")}' csv");
        await Psql(direct, $"\\copy (select * from t order by id) to '{Given.Path("direct.csv")}' csv");
        Assert.Equal(Hash(Given.Path("direct.csv")), Hash(Given.Path("through.csv")));
        const string Sums = "select count(*), sum(n) from t";
        string sums = await Psql(direct, Sums);
        Assert.Equal(sums, await Psql(through, Sums));

        // a pair of which one has failed: no client notices
        ProxyProcess pair = await Given.Proxy("127.0.0.1:0", $"127.0.0.1:{Given.RefusingPort()}", $"127.0.0.1:{port}");
        pair.Tolerate("server");
        string failing = $"host=127.0.0.1 port={pair.Port} user=tester dbname=postgres";
        for (int i = 0; i < 20; i++)
        {
            Assert.Equal(sums, await Psql(failing, Sums));
        }

        async Task<string> Psql(string to, string command) =>
            (await Tool.Run(
                psql, ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", to, "-c", command], 120)).Good();
    }

    [Fact(Timeout = Slow)]
    public async Task Rsync_over_ssh_copies_a_tree_both_ways()
    {
        string rsync = Tool.Need("rsync", "rsync");
        string ssh = Tool.Need("ssh", "openssh-client");
        string sshd = Tool.Need("sshd", "openssh-server");
        string keygen = Tool.Need("ssh-keygen", "openssh-client");
        Tool.NeedRoot("its own sshd");
        Directory.CreateDirectory("/run/sshd");
        (await Tool.Run(keygen, "-q", "-t", "ed25519", "-N", "", "-f", Given.Path("host"))).Good();
        (await Tool.Run(keygen, "-q", "-t", "ed25519", "-N", "", "-f", Given.Path("user"))).Good();
        int port = Given.FreePorts(1);
        string configuration = Given.Write(
            "sshd_config",
            $"""
            Port {port}
            ListenAddress 127.0.0.1
            HostKey {Given.Path("host")}
            AuthorizedKeysFile {Given.Path("user.pub")}
            PidFile none
            StrictModes no
            UsePAM no
            PermitRootLogin yes
            PasswordAuthentication no
            MaxStartups 100
            """ + "\n");
        Tool.Background(Given, sshd, "-D", "-e", "-f", configuration);
        await WaitForPort(port);
        string tree = Directory.CreateDirectory(Given.Path("tree")).FullName;
        Random random = new(3);
        for (int i = 0; i < 400; i++)
        {
            string folder = Directory.CreateDirectory(Path.Combine(tree, $"d{i % 7}", $"e{i % 11}")).FullName;
            WriteRandom(Path.Combine(folder, $"file {i}"), random.Next(20_000));
        }

        WriteRandom(Path.Combine(tree, "large"), 60_000_000);
        File.CreateSymbolicLink(Path.Combine(tree, "link"), "large");

        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", $"127.0.0.1:{port}");
        (await Tool.Run(ssh, [.. Shell(port), "root@127.0.0.1", "true"], 30)).Good();
        await Copy(port, $"{tree}/", $"root@127.0.0.1:{Given.Path("direct")}/");
        await Copy(proxy.Port, $"{tree}/", $"root@127.0.0.1:{Given.Path("pushed")}/");
        await Copy(proxy.Port, $"root@127.0.0.1:{Given.Path("pushed")}/", $"{Given.Path("pulled")}/");
        foreach (string copy in new[] { "direct", "pushed", "pulled" })
        {
            (await Tool.Run("diff", "-r", "--no-dereference", tree, Given.Path(copy))).Good();
        }

        string[] Shell(int to) =>
        [
            "-p", Text(to), "-i", Given.Path("user"), "-o", "StrictHostKeyChecking=no",
            "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-F", "none",
        ];

        async Task Copy(int to, string from, string target) =>
            (await Tool.Run(
                rsync, ["-a", "-e", $"ssh {string.Join(' ', Shell(to))}", from, target], 120)).Good();
    }

    private static string Text(int number) => number.ToString(CultureInfo.InvariantCulture);

    private static string Hash(string file)
    {
        using FileStream stream = File.OpenRead(file);
        return Convert.ToHexString(SHA256.HashData(stream));
    }

    private static void WriteRandom(string file, int size)
    {
        byte[] data = new byte[size];
        new Random(size).NextBytes(data);
        File.WriteAllBytes(file, data);
    }

    internal static Task WaitForPort(int port) => Wait.Until(
        () =>
        {
            using Socket probe = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
            try
            {
                probe.Connect(System.Net.IPAddress.Loopback, port);
                return true;
            }
            catch (SocketException)
            {
                return false;
            }
        },
        $"a server on port {port}");
}
