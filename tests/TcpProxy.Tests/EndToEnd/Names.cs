using System;
using System.Net;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>
/// Names that only the proxy under test sees: it runs in a mount namespace with its own /etc/hosts and
/// /etc/resolv.conf, and asks a name server of the test on loopback. Nothing leaves the machine.
/// </summary>
internal sealed class Names : IDisposable
{
    private readonly Socket? _server;
    private readonly bool _answers;
    private int _asked;
    private volatile IPAddress? _answer;

    private Names(Given given, string[] hosts, bool answers)
    {
        _answers = answers;
        _server = new Socket(AddressFamily.InterNetwork, SocketType.Dgram, ProtocolType.Udp);
        IPAddress address = new(
            [127, (byte)Random.Shared.Next(1, 255), (byte)Random.Shared.Next(1, 255), 53]);
        _server.Bind(new IPEndPoint(address, 53));
        Resolver = $"nameserver {address}\noptions timeout:30 attempts:1\n";
        Launch = LaunchWith(given, hosts, Resolver);
        _ = ServeAsync();
    }

    /// <summary>How to start a proxy that sees these names.</summary>
    public Launch Launch { get; }

    /// <summary>resolv.conf with the name server of the test.</summary>
    public string Resolver { get; }

    /// <summary>How many questions came to the name server.</summary>
    public int Asked => Volatile.Read(ref _asked);

    /// <summary>These lines of /etc/hosts; every other name does not exist.</summary>
    public static Task<Names> Hosts(Given given, params string[] lines) => Make(given, lines, answers: true);

    /// <summary>These lines of /etc/hosts; the name server answers nothing else, ever.</summary>
    public static Task<Names> SilentServer(Given given, params string[] lines) =>
        Make(given, lines, answers: false);

    /// <summary>How to start a proxy that asks the name server at <paramref name="address"/>, port 53.</summary>
    public static async Task<Launch> Server(Given given, IPAddress address)
    {
        await NeedNamespaces();
        return LaunchWith(given, ["127.0.0.1 localhost"], $"nameserver {address}\noptions timeout:2 attempts:2\n");
    }

    /// <summary>From now on every name has this one address.</summary>
    public void Answer(IPAddress address) => _answer = address;

    public void Dispose() => _server?.Dispose();

    private static async Task<Names> Make(Given given, string[] lines, bool answers)
    {
        await NeedNamespaces();
        return given.Owned(new Names(given, lines, answers));
    }

    private static async Task NeedNamespaces()
    {
        Tool.NeedRoot("a mount namespace");
        string unshare = Tool.Need("unshare", "util-linux");
        Outcome tried = await Tool.Run(unshare, "-m", "true");
        Assert.SkipUnless(tried.Status == 0, $"no mount namespaces here: {tried.Err}");
    }

    private static Launch LaunchWith(Given given, string[] hosts, string resolver)
    {
        string hostsFile = given.Write("hosts", string.Join('\n', hosts) + "\n");
        string resolverFile = given.Write("resolv.conf", resolver);
        string script = $"mount --bind {hostsFile} /etc/hosts && mount --bind {resolverFile} /etc/resolv.conf"
            + " && exec \"$0\" \"$@\"";
        return new Launch { Before = ["unshare", "-m", "sh", "-c", script] };
    }

    private async Task ServeAsync()
    {
        byte[] packet = new byte[512];
        EndPoint any = new IPEndPoint(IPAddress.Any, 0);
        try
        {
            while (true)
            {
                SocketReceiveFromResult got = await _server!.ReceiveFromAsync(packet.AsMemory(), any);
                Interlocked.Increment(ref _asked);
                if (_answers)
                {
                    // the same question back, with QR, RD, RA and NXDOMAIN or an answer, without additional records
                    int end = 12 + packet.AsSpan(12).IndexOf((byte)0) + 5;
                    bool isAddress = packet[end - 3] == 1; // A, not AAAA
                    (packet[2], packet[3]) = (0x81, _answer is null ? (byte)0x83 : (byte)0x80);
                    packet.AsSpan(6, 6).Clear();
                    if (_answer is { } answer && isAddress)
                    {
                        packet[7] = 1;
                        byte[] record = [0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, .. answer.GetAddressBytes()];
                        record.CopyTo(packet, end);
                        end += record.Length;
                    }

                    await _server.SendToAsync(packet.AsMemory(0, end), got.RemoteEndPoint);
                }
            }
        }
        catch (Exception e) when (e is ObjectDisposedException or SocketException)
        {
            // the test is over
        }
    }
}
